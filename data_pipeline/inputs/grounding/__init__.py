"""Images with boxes: captions with boxes of their phrases, COCO instances, screenshots of web pages."""
