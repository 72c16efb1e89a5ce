"""What can be packed: folders of images, files of arrays and tables, each opened as samples with named fields."""
