from fpnx.cli import main

raise SystemExit(main())
