"""Tables: means over cases and pairs, and the Markdown report."""

from minidrag.bench import tables


def test_lost_objects_have_no_distance_and_are_left_out_of_its_mean() -> None:
    rows = [{"distance": 4.0, "lost": False}, {"distance": None, "lost": True}]
    found = tables.means(rows)
    assert found["distance"] == {"mean": 4.0, "low": 4.0, "high": 4.0, "count": 1}
    assert found["lost"] and found["lost"]["mean"] == 0.5 and found["MD"] is None


def test_values_of_a_list_count_one_by_one() -> None:
    found = tables.means([{"MD": [1.0, 2.0, 6.0]}, {"MD": 7.0}, {"MD": None}])["MD"]
    assert found and found["mean"] == 4 and found["count"] == 4
