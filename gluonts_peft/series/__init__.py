"""Series in and out: tables and files, calendars, the check of entries."""

__all__: list[str] = []
