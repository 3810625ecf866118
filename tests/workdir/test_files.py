import json
import math

import pytest

from mobilenet_jax.workdir.files import write_json_atomic


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "result.json"
    write_json_atomic(path, {"top1": 0.1, "name": "v2"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, {"top1": math.nan})
    assert json.loads(path.read_text()) == {"top1": 0.1, "name": "v2"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
