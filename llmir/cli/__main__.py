from llmir.cli import main

main()
