"""The searched front against the presets, both on held-out prompts: hypervolumes, and speed at every preset's loss."""

from collections.abc import Mapping, Sequence

from autoprune.search.front import hypervolume, non_dominated, objectives, reference_of
from autoprune.search.records import Measurement, Rivalry


def rivalry(front: Sequence[Measurement], presets: Mapping[str, Measurement], *, max_drop: float) -> Rivalry | None:
    """Compares held-out measurements of one interleaved run; None without a preset that keeps the budget."""
    rivals = {name: measured for name, measured in presets.items() if measured.drop <= max_drop}
    rivals = {name: rivals[name] for name in non_dominated(rivals, lambda name: objectives(rivals[name]))}
    if not rivals:
        return None
    members = [measured for measured in front if measured.drop <= max_drop]
    reference = reference_of(map(objectives, [*members, *rivals.values()]))
    ratios = {}
    for name, rival in rivals.items():
        faster = [member.speed_up for member in members if member.loss <= rival.loss]
        ratios[name] = max(faster, default=1.0) / rival.speed_up
    return Rivalry(
        front=hypervolume(map(objectives, members), reference),
        presets=hypervolume(map(objectives, rivals.values()), reference),
        ratios=ratios,
        best=max(rivals, key=lambda name: hypervolume([objectives(rivals[name])], reference)),
    )
