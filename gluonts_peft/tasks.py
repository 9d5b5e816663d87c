"""Old place of `gluonts_peft.objectives`, from where its names are imported now."""

from .objectives import ForecastLoss, Joint, Task, parse_tasks

__all__ = ["ForecastLoss", "Joint", "Task", "parse_tasks"]
