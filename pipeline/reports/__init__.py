"""Reports of finished runs: HTML pages and plots."""

import logging

# matplotlib builds its font cache at its first import, and logs a warning if that takes over 5 s.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
