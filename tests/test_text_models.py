"""What text encoders remember."""

from autoprune.backbones.text_models import PromptMemory


def test_prompts_are_encoded_once_and_the_least_recently_used_forgotten() -> None:
    memory, asked = PromptMemory[str](2), []

    def encode(prompt: str) -> str:
        asked.append(prompt)
        return prompt.upper()

    assert memory.of(["a", "b", "a"], encode) == ["A", "B", "A"] and asked == ["a", "b"]
    assert memory.of(["a", "c"], encode) == ["A", "C"]
    assert memory.of(["a", "b", "c"], encode) == ["A", "B", "C"] and asked == ["a", "b", "c", "b"]
