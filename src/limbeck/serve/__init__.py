"""An exported student behind an API or on the command line, without torch.

``open_model`` loads the ONNX file of a run, believed only where its hash is the recorded one; ``answers`` is ``limbeck predict``, ``serve`` is
``limbeck serve``. numpy, pillow, tokenizers and onnxruntime are enough for the first two; the web is imported by ``serve`` alone.
"""

from __future__ import annotations

from limbeck.serve._model import Refused, ServedModel, open_model, softmax
from limbeck.serve._predict import answers
from limbeck.serve._settings import Settings

__all__ = ["Refused", "ServedModel", "Settings", "answers", "open_model", "softmax"]
