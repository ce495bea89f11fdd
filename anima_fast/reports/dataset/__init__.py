"""A dataset before it is trained: what will be used and how, and what is wrong with it.

`survey.py` gathers everything from the plan of `data/plan.py`, which training uses too, and from
the pixels; `terminal.py` and `page.py` show it; `health.py` is the part that training itself
writes; `masks.py` draws the loss masks over their images. No model is loaded.
"""
