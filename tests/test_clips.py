"""Clips and repetitions of schedules, counted by hand."""

from autoprune.clips import ONCE_EACH, Course, clip_frames, clip_ranges

IMAGE = ((1, 1, 1), (1, 2, 3), (1, 4, 7))
VIDEO = (*IMAGE, (4, 1, 1), (4, 2, 3), (4, 4, 7), (2, 1, 1), (2, 2, 3), (2, 4, 7))


def test_a_clip_begins_where_frames_get_smaller() -> None:
    assert clip_ranges(IMAGE) == (range(3),)
    assert clip_ranges(VIDEO) == (range(3), range(3, 6), range(6, 9))
    assert clip_ranges(((1, 1, 1), (1, 2, 2), (1, 2, 2))) == (range(3),)


def test_frames_go_on_from_clip_to_clip() -> None:
    assert clip_frames(VIDEO) == (range(1), range(1, 5), range(5, 7))
    assert clip_frames(IMAGE) == (range(1),)


def test_runs_of_scales_are_numbered_over_the_whole_schedule() -> None:
    course = Course((2, 1, 3))
    assert course.by_step(3) == (0, 0, 1, 2, 2, 2)
    assert [course.first_step(scale) for scale in range(3)] == [0, 2, 3]
    assert ONCE_EACH.by_step(3) == (0, 1, 2) and ONCE_EACH.first_step(2) == 2 and ONCE_EACH.times(1) == 1
