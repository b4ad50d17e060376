"""Tables, figures and the HTML page.

Read ``html`` first, then ``figures`` and ``plots``.
"""
