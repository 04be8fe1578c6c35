def score(run): return 0
CLIP, PROTO, EQUAL_TIME = "CLIP", "ProtoCLIP", "CLIP, time of ProtoCLIP"
PAGE=None
def write_report(*a): print("report")
