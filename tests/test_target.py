"""What programs are compiled for."""

import types

import jax

from grpo_jax.models.target import compiling_for, device_count, on_cpu


def test_the_devices_that_are_present_unless_others_are_named():
    assert on_cpu() and device_count() == jax.device_count()
    slice_of_tpus = [types.SimpleNamespace(platform="tpu")] * 4
    with compiling_for(slice_of_tpus):
        assert not on_cpu() and device_count() == 4
        with compiling_for(jax.devices()):
            assert on_cpu() and device_count() == jax.device_count()
        assert device_count() == 4
    assert on_cpu() and device_count() == jax.device_count()
