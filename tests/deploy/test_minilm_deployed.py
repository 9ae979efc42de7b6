"""An encoder fine-tuned on sentences by deployed clients: the same adapter as in process.

    FEDGRAFT_MINILM=FOLDER FEDGRAFT_SST2=FOLDER make soak

takes all-MiniLM-L6-v2 and SST-2 (train.tsv, dev.tsv); without them a small BERT of random weights
learns made sentences.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from real_federation import furthest, real_federation
from tiny_models import save_bert

from fedgraft.config import Config
from simulations.simulate import simulate

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
NAMES = ("0", "1", "2")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    given = os.environ.get("FEDGRAFT_MINILM")
    return Path(given) if given else save_bert(tmp_path / "base")


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    if given := os.environ.get("FEDGRAFT_SST2"):
        return Path(given)
    for split, count in (("train", 90), ("dev", 24)):
        rows = [f"a {'good' if k % 2 else 'bad'} film\t{k % 2}" for k in range(count)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(rows))
    return tmp_path


def test_deployed_clients_come_to_the_same_adapter(
    base: Path, sentences: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """25 steps on each of three clients, over TLS with node keys and the gateway."""
    settings = {
        "model.base": str(base),
        "model.device": "cpu",
        "task.data": str(sentences),
        "task.samples": 600,
        "federation.clients": len(NAMES),
        "federation.min-clients": len(NAMES),
        "federation.rounds": 5,
        "strategy.name": "fedavg",
        "train.steps": 5,
        "evaluate.every": 5,
        "evaluate.clients": False,
        "threads": 1,
    }
    recipe = ROOT / "examples" / "minilm-sst2.toml"
    config = Config.load(recipe).with_overrides(settings)
    plain = config.to_dict()
    plain.pop("compare")
    here = simulate(Config.from_dict(plain), tmp_path / "here")
    with real_federation(tmp_path_factory.mktemp("m"), NAMES) as federation:
        for name in NAMES:
            assert federation.stop_client(name) == 0
            file = federation.config(name)
            text = file.read_text()
            text = text.replace("[data]", f'[data]\npath = "{sentences}"')
            text = text.replace("[model]", f'[model]\nbase = "{base}"')
            file.write_text(text)
            federation.policy(name, "")
            federation.start_client(name)
        run = federation.submit("there", settings, config=recipe)
        said = run.done()
    records = run.rounds()
    assert [len(record["clients"]) for record in records] == [3] * 5, said
    assert furthest(run.out / "adapter", here / "adapter") <= 1e-5
