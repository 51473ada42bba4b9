"""First to run on the node: makes the modules that came over stdin importable, and starts the agent."""

import gc
import sys
from importlib.machinery import ModuleSpec
from typing import Any, Dict, Optional, Sequence


class Carried:
    """Finder and loader of modules whose source is in memory; every prefix of a name is a package."""

    def __init__(self, sources: Dict[str, str]) -> None:
        self.sources = sources
        self.packages = {name.rpartition(".")[0] for name in sources} | {"probes"}

    def find_spec(
        self, name: str, path: Optional[Sequence[str]] = None, target: object = None
    ) -> Optional[ModuleSpec]:
        if name in self.sources or name in self.packages:
            return ModuleSpec(name, self, is_package=name in self.packages)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        name = module.__name__
        file = name.replace(".", "/") + ".py"
        exec(compile(self.sources.get(name, ""), file, "exec", dont_inherit=True), module.__dict__)


def start(nonce: str, payload: Dict[str, Any]) -> None:
    """Never returns: ends the process with the agent's exit status."""
    sys.excepthook = sys.__excepthook__
    gc.disable()
    sys.dont_write_bytecode = True
    sys.meta_path.insert(0, Carried(payload["modules"]))
    from probes.agent import main

    main.main(nonce, payload["request"])
