"Each notebook is a test: it runs top to bottom in a process of its own, without its slow and GPU cells."
import subprocess
import sys
from pathlib import Path

import pytest

NBS = Path(__file__).parents[1] / "nbs"

RUN = """
import sys, warnings; warnings.simplefilter("ignore")
from pathlib import Path
from nbdev.test import test_nb
ok, _ = test_nb(Path(sys.argv[1]), skip_flags=["notest", "slow", "gpu"])
sys.exit(not ok)
"""


@pytest.mark.parametrize("path", sorted(NBS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook(path):
    out = subprocess.run([sys.executable, "-c", RUN, str(path)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
