"Each appendix is a test, as each chapter is (test_notebooks.py); a file of its own for a worker."

import pytest
from test_notebooks import APPENDICES, run


@pytest.mark.parametrize("path", APPENDICES, ids=lambda p: p.stem)
def test_appendix(path, wheel, tmp_path):
    out = run(path, wheel, tmp_path)
    assert out.returncode == 0, out.stderr[-3000:]
