"""The report of the study: the general one, with the answers among what is measured."""

from train.reporting.layout import Layout

LAYOUT = Layout(
    part_names={"text": "held-out text", "needles": "text with needles", "answers": "digits of answers"},
    drawn_parts=("text", "answers"),
    summary_losses={"answers": "loss at the digits of answers"},
)
