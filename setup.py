"""Carries the start-up hook, `ttt_harness_startup.pth`, into site-packages. All else is in setup.cfg.

A wheel gets the file as it is. An editable install gets one line more, which makes `task_configs/` importable as
`ttt_harness.task_configs`: the path entry that setuptools writes (`mode = compat`) cannot rename a package.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HOOK = "ttt_harness_startup.pth"
EDITABLE_LINE = """\
import sys; sys.meta_path.append(type("TTTHarnessEditable", (), {{"find_spec": staticmethod(lambda name, *_: \
__import__("importlib.util").util.spec_from_file_location(name, {path!r}) if name == {name!r} else None)}}))
"""


class build_py_with_hook(build_py):
    """Also writes the hook, and lists it for source distributions."""

    def run(self) -> None:
        super().run()
        text, folder = Path(HOOK).read_text(encoding="utf-8"), self.build_lib
        if self.editable_mode:
            path = Path("task_configs", "__init__.py").resolve()
            text += EDITABLE_LINE.format(name="ttt_harness.task_configs", path=str(path))
            folder = self.get_finalized_command("install").install_lib  # what the wheel will hold besides metadata
        self.mkpath(folder)
        Path(folder, HOOK).write_text(text, encoding="utf-8")

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), HOOK]


setup(cmdclass={"build_py": build_py_with_hook})
