"""Numbers and tables as text."""

MIB, GIB = 2**20, 2**30


def show_duration(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 07 min` or `3 d 04 h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600:02d} h"
