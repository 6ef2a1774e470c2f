from statekv.video.damage import Damage


def test_a_sound_video_has_no_complaint():
    assert Damage().complaint(0.0, 13.0, 13.0, 0.04) == ""
    assert Damage().complaint(0.0, 13.0, None, 0.04) == ""


def test_a_gap_at_the_end_must_be_real():
    assert Damage().complaint(5.0, 17.1, 13.0, 0.04) == ""
    assert Damage().complaint(5.0, 16.9, 13.0, 0.04) != ""
    assert Damage().complaint(0.0, 93.0, 100.0, 2.0) == ""


def test_times_count_from_the_start():
    assert Damage().complaint(8.0, 14.2, 13.0, 0.04).startswith(" ends at 6.2 s of 13.0 s: ")


def test_skipped_pieces_are_counted():
    assert Damage(pieces=3).complaint(0.0, 13.0, 13.0, 0.04).startswith(": 3 damaged")
    assert "; 3 damaged" in Damage(pieces=3).complaint(0.0, 6.0, 13.0, 0.04)


def test_a_read_error_is_named_even_without_a_known_length():
    text = Damage(stop_reason="reading stopped (timed out)").complaint(0.0, 6.0, None, 0.04)
    assert text == " ends at 6.0 s: reading stopped (timed out)"
