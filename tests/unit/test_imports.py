"""Serving code pays for nothing that it does not use."""

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


def test_importing_the_package_loads_nothing_but_itself() -> None:
    assert loaded_after("import kvr_partition") <= {"kvr_partition", *sys.stdlib_module_names}


def test_the_serving_names_need_no_more_than_msgspec() -> None:
    loaded = loaded_after(
        "from kvr_partition import KVRError, Lookup, OutOfRangeError, Partition, PartitionTable, load"
    )
    assert "msgspec" in loaded
    assert not loaded & set(HEAVY)


def test_every_public_name_is_there() -> None:
    import kvr_partition

    for name in kvr_partition.__all__:
        assert getattr(kvr_partition, name) is not None
        assert name in dir(kvr_partition)


def test_arrows_go_one_way() -> None:
    search = modules_after("import kvr_partition.search")
    assert not {
        name for name in search if name.startswith(("profiler", "kvr_partition.runtime", "kvr_partition.cli"))
    }
    runtime = modules_after("import kvr_partition.runtime")
    assert not {
        name for name in runtime if name.startswith(("profiler", "kvr_partition.search", "kvr_partition.cli"))
    }
    profiler = modules_after("import profiler.ranks, profiler.process, profiler.calibrate")
    assert not {name for name in profiler if name.startswith(("kvr_partition.search", "kvr_partition.cli"))}
