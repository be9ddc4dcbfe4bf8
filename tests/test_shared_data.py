"""Reading the reference data: rows end at newlines and nowhere else."""

import gzip
import json

import shared_data


def test_rows_of_text_may_hold_other_line_separators(tmp_path, monkeypatch):
    rows = [{"text": "One.\u2028Two.\u2029Three.\x85Four."}, {"text": "京都"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "ki_goldens").mkdir()
    (tmp_path / "plain.jsonl").write_bytes(text.encode())
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    monkeypatch.setenv("SEAL_JAX_DATA", str(tmp_path))
    assert shared_data.read("plain.jsonl") == shared_data.read("packed.jsonl") == rows
