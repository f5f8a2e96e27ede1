"""The published base and its fine-tune, fetched by the script of `examples/minilm`."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

RECIPES = Path(__file__).parents[2] / "examples" / "minilm"


def script() -> ModuleType:
    """`examples/minilm/fetch.py`, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("minilm_fetch", RECIPES / "fetch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Published:
    """The folders of the two models, and their recipes."""

    base: Path
    sre: Path

    def recipe(self, name: str, *overrides: str) -> Any:
        """A recipe of `examples/minilm` with the models where the cache has them."""
        import mergetool

        return mergetool.load(RECIPES / f"{name}.yaml", (*self.places(name), *overrides))

    def places(self, name: str) -> list[str]:
        """The overrides that put the cache's folders in; none where the recipe finds them by itself."""
        written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        named = {"base_model": written["base_model"]}
        named |= {f"models.{i}.model": model["model"] for i, model in enumerate(written["models"])}
        folders = {"base": self.base, "sre": self.sre}
        return [
            f"{key}={folders[Path(path).name]}"
            for key, path in named.items()
            if Path(path).expanduser() != folders[Path(path).name]
        ]


@pytest.fixture(scope="session")
def published() -> Published:
    fetch = script()
    try:
        return Published(fetch.fetch("base"), fetch.fetch("sre"))
    except fetch.UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One thread, no progress bars, and nothing that asks the Hub."""
    torch = pytest.importorskip("torch")
    logging = pytest.importorskip("transformers.utils.logging")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.enable_progress_bar()
