"""Running what was exported or built: one session per backend.

Read ``open_session`` first, then the session of your backend.
"""
