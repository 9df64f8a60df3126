"""``python -m t5_trt.cli`` is ``t5-trt``."""

from t5_trt.cli import main

if __name__ == "__main__":
    main()
