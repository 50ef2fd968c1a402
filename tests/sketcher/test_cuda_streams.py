"""A batch is sketched on one stream: modules on others are refused by name."""

from __future__ import annotations

import pytest
import torch
from support import zoo

from cropi_kernels import GradientSketcher, SketchSpec, _gpu


def test_a_module_on_another_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    current, batch, model, where = [1], zoo.padded(), zoo.make("llama"), "model.layers.1.mlp.up_proj"
    monkeypatch.setattr(_gpu, "stream", lambda device: current[-1])
    module = model.get_submodule(where)
    with GradientSketcher(model, SketchSpec(width=16, vocab_width=64)) as sketcher:
        want = batch.sketch(sketcher).sketches
        with (
            module.register_forward_pre_hook(lambda *args: current.append(2)),
            module.register_forward_hook(lambda *args: current.remove(2), always_call=True),
        ):
            with pytest.raises(RuntimeError, match=rf"{where} runs on another CUDA stream than the one"):
                batch.sketch(sketcher)
        del current[1:]
        assert torch.equal(batch.sketch(sketcher).sketches, want)
        current[:] = [3]  # all of a pass on a stream of the user's
        assert torch.equal(batch.sketch(sketcher).sketches, want)
