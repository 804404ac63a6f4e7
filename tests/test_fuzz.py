"""A small part of tests/long/fuzz.py: damaged files are read or reported."""
import pytest
from fuzz import fuzz


@pytest.mark.parametrize('kind, n', [('annotation', 500), ('image', 150), ('checkpoint', 60)])
def test_any_file_is_read_or_named(tmp_path, kind, n):
    results = fuzz(kind, n, str(tmp_path), seed=2)
    assert results['read'] > n / 20 and results['reported'] > n / 20 and sum(results.values()) == n
