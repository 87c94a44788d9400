"""Puts the .pth file beside the modules, where Python reads it at start: setuptools has no setting for that."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = "torchvision_without_operators.pth"


class BuildWithPth(build_py):
    """build_py that copies the .pth file too."""

    def run(self) -> None:
        super().run()
        self.copy_file(str(Path(__file__).with_name(PTH)), str(Path(self.build_lib, PTH)))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, PTH))]


setup(cmdclass={"build_py": BuildWithPth})
