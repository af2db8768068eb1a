"""baton-tiny, the built-in model: where its folder is.

It imports neither torch nor transformers, so that asking for the folder costs nothing.
"""

from pathlib import Path

MODEL_FOLDER: Path = Path(__file__).parent / "model"
