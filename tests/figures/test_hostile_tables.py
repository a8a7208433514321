"""Damaged and hostile tables of a run are refused by name, and run no code."""

import numpy as np
import pytest
from hostile import hostile_arrays, npz, refused

import plotting
from lab.folders.reading import UnreadableRun


@pytest.mark.parametrize("name", ["samples.npz", "gradcam.npz"])
def test_hostile_pictures_of_a_run(tmp_path, intruder, name):
    pictures, group = np.zeros((4, 28, 28, 3)), np.arange(4)
    hostile = hostile_arrays(intruder, ("pictures", pictures), ("group", group))
    del hostile["encrypted"]  # numpy reads what is not, whatever the flag says
    hostile |= {
        "a line": npz(pictures=pictures[:, 0, 0, 0], group=group),
        "too few": npz(pictures=pictures[:3], group=group),
        "text": npz(pictures=np.full((4, 2, 2, 3), "a"), group=group),
        "channels": npz(pictures=np.zeros((4, 2, 2, 9)), group=group),
        "heat": npz(pictures=pictures, group=group, before_dfr=pictures),
    }
    (tmp_path / "samples.npz").write_bytes(npz(pictures=pictures, group=group))  # makes it a run
    path = tmp_path / name
    path.write_bytes(npz(pictures=pictures, group=group))
    plotting.draw(tmp_path)
    del hostile["empty"]  # counts as missing
    for what, content in hostile.items():
        path.write_bytes(content)
        (line,) = refused(lambda: plotting.draw(tmp_path), path, kind=UnreadableRun)
        assert ("bytes unpacked" in line) == (what == "a bomb"), what


@pytest.mark.parametrize(
    "table, content",
    [
        ("config_used.yaml", "[" * 10**5),
        ("config_used.yaml", "a: !!python/object/apply:os.mkdir [intruded]"),
        ("config_used.yaml", "5"),
        ("dfr_results.json", "[" * 10**5),
        ("dfr_results.json", '{"before": 5, "after": 6}'),
        ("training_history.csv", "epoch,train_avg_loss\na,b\n"),
        ("training_history.csv", "epoch,train_avg_loss\n1,b\n"),
        ("group_counts.csv", "split,group,y,a,name,count\ntrain,x,y,z,n,c\n"),
        ("analysis.csv", "epoch,split,analysis,pair,quantity,value\na,b,c,,d,x\n"),
    ],
)
def test_hostile_tables_of_a_run(tmp_path, monkeypatch, table, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples.npz").write_bytes(npz(pictures=np.zeros((1, 2, 2, 3)), group=np.zeros(1)))
    (tmp_path / table).write_text(content)
    refused(lambda: plotting.draw(tmp_path), tmp_path / table, kind=UnreadableRun)
    assert not (tmp_path / "intruded").exists()
