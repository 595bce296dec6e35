"""What text encoders remember."""

import threading
import time

from autoprune.backbones.text_models import PromptMemory


def test_prompts_are_encoded_once_and_the_least_recently_used_forgotten() -> None:
    memory, asked = PromptMemory[str](2), []

    def encode(prompt: str) -> str:
        asked.append(prompt)
        return prompt.upper()

    assert memory.of(["a", "b", "a"], encode) == ["A", "B", "A"] and asked == ["a", "b"]
    assert memory.of(["a", "c"], encode) == ["A", "C"]
    assert memory.of(["a", "b", "c"], encode) == ["A", "B", "C"] and asked == ["a", "b", "c", "b"]


def test_threads_encode_one_at_a_time_each_prompt_once_and_get_their_own() -> None:
    memory, inside, asked, wrong = PromptMemory[str](3), [], [], []

    def encode(prompt: str) -> str:
        inside.append(prompt)
        time.sleep(0.002)
        asked.append(prompt)
        if len(inside) > 1:
            wrong.append(list(inside))
        inside.remove(prompt)
        return prompt.upper()

    def work(number: int) -> None:
        for turn in range(20):
            prompts = [f"p{(turn + number) % 7}", f"p{(turn * number) % 5}", "shared"]
            if memory.of(prompts, encode) != [prompt.upper() for prompt in prompts]:
                wrong.append(prompts)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and set(asked) >= {"shared", "p0", "p6"}
    assert asked.count("shared") == 1, "the most recently used is never forgotten"
