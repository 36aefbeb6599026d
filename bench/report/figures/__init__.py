"""Charts into pictures. The only package that imports matplotlib."""
