"""Quality of every size: on text, and on the tasks of lm-eval."""
