def draw_scale(r):
    return ""
