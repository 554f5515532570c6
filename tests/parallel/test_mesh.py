"""Meshes over several slices or hosts: placement of axes, and errors for sizes that do not fit."""

import types

import numpy as np
import pytest

from jaxalign.parallel.mesh import make_mesh, split_devices, split_over_slices
from jaxalign.run.config.runs import load_config

SIZES = {"data": 4, "fsdp": 2, "tensor": 2, "sequence": 1, "expert": 1}


def devices(slices, each, *, hosts=None):
    """Fake devices: `slices` of `each`; or one slice over several hosts."""
    return [
        types.SimpleNamespace(
            id=i,
            platform="cpu",
            device_kind="cpu",
            slice_index=0 if hosts else i // each,
            process_index=i // each if hosts else 0,
        )
        for i in range(slices * each)
    ]


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        (1, {}),
        (2, {"data": 2, "fsdp": 1}),
        (4, {"data": 4, "fsdp": 1}),
        (8, {"data": 4, "fsdp": 2}),  # `data` first, then the next axis
    ],
)
def test_slices_split_the_first_axes_they_divide(slices, expected):
    found = split_over_slices(SIZES, devices(slices, 16 // slices), None)
    assert {name: found[name] for name in expected} == expected
    assert int(np.prod(list(found.values()))) == slices if found else slices == 1


def test_tensor_axis_stays_within_a_slice(monkeypatch):
    """fsdp × tensor within a slice, replicas across slices; or as `dcn` says."""
    built = []
    monkeypatch.setattr(
        "jaxalign.parallel.mesh.Mesh", lambda placed, *args, **kw: built.append(placed)
    )
    make_mesh(4, 2, 2, devices(2, 8))
    make_mesh(4, 2, 2, devices(2, 8), dcn={"fsdp": 2})
    make_mesh(4, 2, 2, devices(2, 8, hosts=True), dcn={"data": 2})
    by_data, by_fsdp, by_host = (np.vectorize(lambda d: d.id // 8)(placed) for placed in built)
    assert by_data.shape == (4, 2, 2)
    assert (by_data == np.array([0, 0, 1, 1])[:, None, None]).all()
    assert (by_fsdp == np.array([0, 1])[None, :, None]).all()
    assert (by_host == by_data).all()


@pytest.mark.parametrize(
    ("dcn", "message"),
    [
        ({"date": 2}, r"dcn: no such axis 'date'; known: data, fsdp"),
        ({"data": 3}, r"dcn data=3 does not divide the axis data=4; .*fit: \[1, 2, 4\]"),
        ({"data": 4}, r"dcn data=4 wants 4 slices, there are 2; .*product is 2"),
    ],
    ids=str,
)
def test_dcn_counts_that_do_not_fit_are_refused(dcn, message):
    with pytest.raises(ValueError, match=message):
        split_over_slices(SIZES, devices(2, 8), dcn)


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"8 of slice 0, 4 of slice 1: wanted as many of each"):
        split_over_slices(SIZES, devices(2, 8)[:12], None)


def test_hosts_replace_slices(tmp_path):
    """One host has all 8 devices: `dcn` of 1 fits, and a config can set it."""
    with pytest.raises(ValueError, match=r"dcn data=2 wants 2 hosts, there are 1"):
        make_mesh(data=2, dcn={"data": 2})
    values = {
        "model": {"source": "m"}, "data": {"train": ["d.jsonl"], "rows": 8, "length": 32},
        "run": {"folder": str(tmp_path), "steps": 1}, "mesh": {"data": 2, "dcn": {"data": 2}},
    }  # fmt: skip
    config = load_config("sft", values)
    assert config.mesh.dcn == {"data": 2}
    with pytest.raises(ValueError, match="wants 2 hosts, there are 1"):
        config.mesh.make()


# Devices of frozen models


def test_split_devices_evenly_over_hosts():
    dealt = split_devices(devices(2, 8, hosts=True), {"reference": 2, "reward": 4})
    numbers = {name: [device.id for device in group] for name, group in dealt.items()}
    assert numbers == {
        None: [0, 1, 2, 3, 4, 8, 9, 10, 11, 12],
        "reference": [5, 13],
        "reward": [6, 7, 14, 15],
    }


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"reward": 3}, r"apart reward=3: wanted a positive multiple of 2"),
        ({"reward": 0}, r"apart reward=0: wanted a positive"),
        ({"reference": 8, "reward": 8}, r"reference=8, reward=8: 16 of 16 devices leave none"),
    ],
    ids=str,
)
def test_split_devices_refuses_uneven_counts(counts, message):
    with pytest.raises(ValueError, match=message):
        split_devices(devices(2, 8, hosts=True), counts)
