"""Compiles the kernels into the wheel; where that cannot be done they are compiled on first use, or not at all."""

import runpy
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileKernels(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        tools = runpy.run_path(str(Path(self.root) / "src/dfrot/kernels/library.py"))
        made = Path(self.root) / "build" / "kernels" / tools["library_name"]()
        try:
            tools["compile_library"](made)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"the kernels are not part of this wheel: {error}")
            return
        build_data["force_include"][str(made)] = f"dfrot/kernels/native/{made.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
