"""``python -m fcos_d2.predict``: ``fcos predict``; see :mod:`fcos_d2.inference.predict`."""

from .inference.predict import main

if __name__ == "__main__":
    main()
