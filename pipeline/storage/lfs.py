"""Git LFS pointers: the small texts that a clone without git-lfs has in place of large files."""

START = b"version https://git-lfs.github.com/spec/"
LARGEST = 1024  # bytes of a pointer, by the specification

WORDS = "it is a Git LFS pointer, not the file itself: `git lfs pull` fetches that"


def is_pointer(content: bytes) -> bool:
    """Whether a file that begins with `content` is a pointer. The whole file is no longer than LARGEST."""
    return content[: len(START)] == START
