"""``protoclip encode``: features of pictures and captions, written to a folder."""
