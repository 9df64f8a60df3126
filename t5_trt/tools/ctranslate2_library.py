"""CTranslate2's package and its translators, loaded so that their threads work at full speed.

CTranslate2 and torch split work with GNU OpenMP. Each copy of that library counts the threads of all its pools, and as soon as they are
more than the processor's cores, threads that wait go to sleep at once instead of waiting some milliseconds for the next piece of work. A
translator with a thread for each core comes to that in two ways, each of which makes 8-bit products of one row 2 to 3 times slower (on
2 cores): where torch is imported first, both use torch's copy of the library; and the thread that loads a model keeps a pool of its own.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from t5_trt.errors import BackendError


def import_ctranslate2() -> Any:
    """Import ctranslate2, with its own copy of GNU OpenMP where the system can do that.

    Raises:
        BackendError: it is not installed, or does not load.
    """
    own_symbols = getattr(os, "RTLD_DEEPBIND", 0)
    flags = sys.getdlopenflags() if own_symbols else 0
    try:
        if own_symbols:
            sys.setdlopenflags(flags | own_symbols)
        import ctranslate2
    except ImportError as error:
        raise BackendError(
            f"a comparison with CTranslate2 needs the package ctranslate2, which did not import ({error}). Install it with "
            "`pip install 't5-trt[ctranslate2]'`."
        ) from error
    finally:
        if own_symbols:
            sys.setdlopenflags(flags)
    return ctranslate2


def open_translator(folder: str, **options: Any) -> Any:
    """Load a translator in a thread that ends, and with it its pool.

    Args:
        folder: of a converted model.
        options: of ``ctranslate2.Translator``.

    Raises:
        BackendError: see `import_ctranslate2`.
    """
    ctranslate2 = import_ctranslate2()
    with ThreadPoolExecutor(1) as loading:
        return loading.submit(ctranslate2.Translator, folder, **options).result()
