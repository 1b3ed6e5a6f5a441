"""What a fresh interpreter has after running something."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "optuna", "sklearn", "scipy", "numpy", "plotly", "rich", "joblib")


def modules_after(code: str) -> set[str]:
    """Modules that a fresh interpreter has after running the code, beyond its own."""
    script = f"import sys; before = set(sys.modules)\n{code}\nprint(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def loaded_after(code: str) -> set[str]:
    """The same, top-level names only."""
    return {name.split(".")[0] for name in modules_after(code)}
