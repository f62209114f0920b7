import pytest

from cifar_tl.runs.formatting import duration_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (41.2, "41 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (359.6, "6 min 00 s"),
        (5790, "1 h 36 min"),
    ],
)
def test_durations_are_rounded_as_a_whole(seconds, text):
    assert duration_text(seconds) == text
