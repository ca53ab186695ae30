"""The report: one HTML file that needs nothing else, for people to look at runs and pass them on.

page.py       puts it together: page.html.j2 with page.css and page.js, and what the runs say as JSON
figures.py    what it shows of the runs: methods, scores, differences, costs, settings
plots.py      the plots of a sweep over settings
questions.py  the single questions with all answers
"""
