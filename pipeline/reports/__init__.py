"""Pages and plots of finished runs."""

import logging

# matplotlib builds its font cache when it is first imported, and warns on stderr where that takes over 5 s.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
