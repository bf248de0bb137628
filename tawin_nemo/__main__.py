"""``python -m tawin_nemo VERB [--recipe FILE] [key=value ...]``"""

import sys

from tawin_nemo.cli import main

# mcore's checkpoint writers may start processes that import this module again
if __name__ == "__main__":
    sys.exit(main())
