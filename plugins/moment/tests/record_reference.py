"""Record what the reference implementation of MOMENT computes, for ``test_moment_network.py``.

    python record_reference.py

The package ``momentfm`` must be importable; its pins are old, so install it with ``pip install --no-deps``. It is not
needed to run the tests.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers


def reference(task: str) -> Any:
    """Return the reference's network for a task, with the weights of the tests."""
    from momentfm import MOMENTPipeline
    from test_moment_network import CONFIG, HORIZON, fill

    options: dict[str, Any] = {"task_name": task}
    if task == "forecasting":
        options["forecast_horizon"] = HORIZON
    network = MOMENTPipeline(config=copy.deepcopy(CONFIG), model_kwargs=options)
    network.init()
    for name, tensor in network.state_dict().items():
        if not name.endswith(".pe"):
            tensor.copy_(fill(name, tensor.shape))
    return network.eval()


def main() -> None:
    """Run as a program."""
    from test_moment_network import windows

    values, given, shown = windows()
    inputs = {"x_enc": values[:, None], "input_mask": given}
    with torch.no_grad():
        found = {
            "reconstruction": reference("reconstruction")(**inputs, mask=shown).reconstruction[:, 0],
            "embeddings": reference("embedding").embed(**inputs, reduction="none").embeddings[:, 0],
            "forecast": reference("forecasting")(**inputs).forecast[:, 0],
        }
    record = {"source": f"momentfm 0.1.4 on transformers {transformers.__version__}, torch {torch.__version__}"}
    record |= {name: _rounded(tensor.tolist()) for name, tensor in found.items()}
    Path(__file__).with_name("reference.json").write_text(json.dumps(record) + "\n")


def _rounded(numbers: Any) -> Any:
    return [_rounded(each) for each in numbers] if isinstance(numbers, list) else float(f"{numbers:.8g}")


if __name__ == "__main__":
    main()
