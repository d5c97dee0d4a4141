"""Triton kernels of aclip, imported as ``aclip.kernels`` (setup.py maps the folder to that name).

Hugging Face ships a package that is also called ``kernels``, and transformers probes for it with
``import kernels``. Wherever this repository's root is on sys.path, that probe finds this folder;
the hand-over below gives it the installed package, or a version too old to be used.
"""

if __name__ == "kernels":
    import importlib.util
    import os
    import sys
    from importlib.machinery import PathFinder

    _root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    _elsewhere = [entry for entry in sys.path if os.path.abspath(entry) != _root]
    _spec = PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
    else:
        __version__ = "0.0.0"
