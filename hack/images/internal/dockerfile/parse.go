// Package dockerfile builds images from the Dockerfiles of this project, which
// begin with "FROM scratch" and copy files. It knows no more of the language than
// they need and refuses the rest, so that an image built here and one that Docker
// builds from the same file hold the same.
package dockerfile

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// Instruction is one line of a Dockerfile.
type Instruction struct {
	Line int
	Name string // upper case
	// Args are the words after the name, or the elements of a JSON array.
	Args []string
	// Mode is what COPY --chmod gives, nil without it.
	Mode *int64
}

// ParseFile reads a Dockerfile.
func ParseFile(name string) ([]Instruction, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	instructions, err := Parse(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return instructions, nil
}

// Parse reads a Dockerfile.
func Parse(r io.Reader) ([]Instruction, error) {
	var instructions []Instruction
	scanner := bufio.NewScanner(r)
	for number := 1; scanner.Scan(); number++ {
		start, line := number, strings.TrimSpace(scanner.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		for strings.HasSuffix(line, `\`) && scanner.Scan() {
			number++
			line = strings.TrimSuffix(line, `\`) + " " + strings.TrimSpace(scanner.Text())
		}
		instruction, err := parseLine(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", start, err)
		}
		instruction.Line = start
		instructions = append(instructions, instruction)
	}
	if err := scanner.Err(); err != nil {
		return nil, err
	}
	if len(instructions) == 0 || instructions[0].Name != "FROM" || len(instructions[0].Args) != 1 || instructions[0].Args[0] != "scratch" {
		return nil, fmt.Errorf(`the first instruction must be "FROM scratch"`)
	}
	return instructions[1:], nil
}

func parseLine(line string) (Instruction, error) {
	name, rest, _ := strings.Cut(line, " ")
	instruction, rest := Instruction{Name: strings.ToUpper(name)}, strings.TrimSpace(rest)
	if rest == "" {
		return instruction, fmt.Errorf("%s has no arguments", instruction.Name)
	}
	switch instruction.Name {
	case "ENTRYPOINT", "CMD":
		if err := json.Unmarshal([]byte(rest), &instruction.Args); err != nil || len(instruction.Args) == 0 {
			return instruction, fmt.Errorf(`%s must be a JSON array of strings, such as ["/bin/true"]`, instruction.Name)
		}
		return instruction, nil
	case "COPY":
		if mode, after, found := strings.Cut(rest, " "); found && strings.HasPrefix(mode, "--chmod=") {
			bits, err := strconv.ParseInt(strings.TrimPrefix(mode, "--chmod="), 8, 16)
			if err != nil || bits < 0 || bits > 0o7777 {
				return instruction, fmt.Errorf("%s: want four octal digits", mode)
			}
			instruction.Mode, rest = &bits, after
		}
	case "FROM", "ENV", "LABEL", "USER", "VOLUME", "WORKDIR":
	default:
		return instruction, fmt.Errorf("%s is not known here: these files only copy (FROM scratch, COPY, ENV, LABEL, USER, VOLUME, WORKDIR, ENTRYPOINT, CMD)", instruction.Name)
	}
	if strings.ContainsAny(rest, `"'$`) || strings.Contains(rest, "--") {
		return instruction, fmt.Errorf("%s: quotes, variables and flags other than COPY --chmod are not known here", instruction.Name)
	}
	instruction.Args = strings.Fields(rest)
	return instruction, nil
}
