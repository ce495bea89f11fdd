"""A dataset before it is trained: what will be used and how, and what is wrong with it.

`survey.py` gathers everything from the plan that training uses and from the pixels; `record.py`
turns it into plain values, which are the JSON and which `terminal.py` and `page.py` show;
`masks.py` draws the loss masks over their images. No model is loaded.
"""
